"""An operator for the tests, which stands beside the others in a copy of the library."""

"""Layer plans shipped with the package, one folder per model family."""

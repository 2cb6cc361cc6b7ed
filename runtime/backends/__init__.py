"""What runs an exported model on a device: one file per kind of runtime, one interface."""

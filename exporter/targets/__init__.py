"""What devices run, one file each; the folder is the registry."""

"""Source spellings of attention, one file each; the folder is the registry."""

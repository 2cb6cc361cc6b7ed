"""Source spellings of attention, one file each (a `SitePattern`); the folder is the registry."""

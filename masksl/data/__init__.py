"""Images of data sets, the functions that read them, and augmentation."""

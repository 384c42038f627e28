"""Data: files and hub data sets, columns, labels, splits, images, texts."""

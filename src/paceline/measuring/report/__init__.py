"""Reports: documents, HTML pages, plots, tables."""

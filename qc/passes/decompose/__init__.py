"""Parts of a weight stored by themselves: low rank, outliers."""

"""How a matrix is stored: a sum of terms, one file per format."""

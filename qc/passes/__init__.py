"""Graph -> Graph, one idea a file, in folders in the order in which pipelines use them."""

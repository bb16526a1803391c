"""What a quantized network is: types, ops, graphs, stored weights and their torch meaning."""

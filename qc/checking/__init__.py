"""What a compilation will give and take, said before it starts; decision 009."""

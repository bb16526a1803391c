"""CPU code through TVM: kernels generated from the formats' decode expressions, plus fast rules."""

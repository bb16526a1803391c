"""GPU kernels for linears: any sum of terms, with what the planner fused around it."""

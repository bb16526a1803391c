"""Speed and accuracy beside peers, measured in turn on the same machine and the same model."""

"""The tests, in the folders of qc; each says what it needs of the machine."""

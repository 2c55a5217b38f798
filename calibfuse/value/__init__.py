"""Value guides: sequence-level constraints as next-token guidance (Meng et al. 2022)."""

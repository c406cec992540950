import benchmark  # noqa: F401  sets TRITON_INTERPRET where there is no GPU, before any test imports the kernel

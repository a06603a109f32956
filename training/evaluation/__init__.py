"""How good adapters are: DreamBooth's protocol, run over subjects, prompts and pictures, with grids and tables."""

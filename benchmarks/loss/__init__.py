"""How fast the fused loss is, beside plain PyTorch, `torch.compile` and a copy of the same bytes."""

"""Plain `nn.Module`s, usable without the rest of hbll."""

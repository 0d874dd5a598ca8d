"""Decoding: texts grown token by token, with what their network keeps of them."""

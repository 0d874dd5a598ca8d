"""Which networks can be trusted: as they are loaded, copied, and given prompts."""

"""Language models whose every next token has the law of another's, changed: by a temperature, or by a cut."""

"""Forward operators, one per file."""

if __name__ != "invguide.operators":
    raise ImportError("import this package as 'invguide.operators'")

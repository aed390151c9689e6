"""Several tasks learned together on one encoder: mixed rows, many heads, one bundle."""

"""One way to print tables: for evaluations, the report of data.corpus and the ablations."""


def table(rows: list[list[str]], markdown: bool = False) -> str:
    """Rows of cells as text. The first row is the heading; the first column is left-aligned."""
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

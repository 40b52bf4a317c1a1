"""Figures and Markdown."""
from statistics import median


def number(value, digits=0):
    return "" if value is None else f"{value:,.{digits}f}"


def ratio(value, base):
    return "" if not base or value is None else f"{100 * value / base:.0f} %"


def table(title, heads, rows):
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def percentiles(values):
    """p50, p90, p99, p99.9 by the nearest rank."""
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(len(ordered) * p))] for p in (0.5, 0.9, 0.99, 0.999)] if ordered else [None] * 4


def spread(values):
    """The median, and how far rounds were apart."""
    middle = median(values)
    return middle, (max(values) - min(values)) / middle if middle else 0

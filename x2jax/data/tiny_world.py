"""Data sets of the tiny world by name: "tiny:N" is N samples, made below the workdir once."""

PREFIX = "tiny:"


def count_of(data: str) -> int | None:
    """N of "tiny:N"; None for other data.

    Raises:
      ValueError: "tiny:" without a number.
    """
    if not data.startswith(PREFIX):
        return None
    try:
        return int(data.removeprefix(PREFIX))
    except ValueError:
        raise ValueError(f"--config.data={data}: write tiny:N for N samples to make") from None

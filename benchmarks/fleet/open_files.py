"""Room for the sockets of hundreds of connections in one process."""

import resource


def allow_many() -> int:
    """Raise this process's soft limit of open files to what it may have; that limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard

import logging


def _is_of_use(record: logging.LogRecord) -> bool:
    """Where there is no home folder, matplotlib keeps its list of fonts elsewhere, and says so at length."""
    message = record.getMessage()
    return "temporary cache directory" not in message and "mkdir -p failed" not in message


logging.getLogger("matplotlib").addFilter(_is_of_use)  # here, before any module of this folder imports it

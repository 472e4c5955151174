from ..configuration.remote_code import AUTO_MAP, copy_remote_code, write_remote_code  # noqa: F401

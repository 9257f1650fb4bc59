"""The questions, a module each: what `mixlab study NAME` asks is the STUDY of the module NAME."""

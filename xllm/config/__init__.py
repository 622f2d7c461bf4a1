"""Every setting of xLLM: frozen dataclasses, composed; see `settings` for the whole."""

"""The servable directory and the plugin with which unmodified vLLM serves it."""

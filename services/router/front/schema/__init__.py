"""The fields of OpenAI's requests: those that are served and those that are refused. Pure."""

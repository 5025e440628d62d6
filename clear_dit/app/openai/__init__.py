"""OpenAI's image API, for programs that speak it: below /v1."""

"""OpenAI's HTTP API: a module an endpoint, each with `add_routes(app, service)`."""

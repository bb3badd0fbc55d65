"""An OpenAI-shaped HTTP server over the engine of `qnext.runtime`; needs the extra `serve`."""

"""Meeting other libraries: each module here is named after the one it meets."""

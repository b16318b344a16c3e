"""`vmplug cdi`: specs and a config.json out of arguments; what people and programs see of them."""

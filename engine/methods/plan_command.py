def add_parser(commands, add_config):
    return None

"""One file per method; `vlmfix.registry` names them, `vlmfix methods` lists them."""

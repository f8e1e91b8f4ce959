"""The replay loader, without SGLang: small models stand for SGLang's."""

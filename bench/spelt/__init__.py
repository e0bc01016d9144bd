"""One plain ViT whose every part can be written in many ways: `model.Respelt`, by the names in a `model.Spelling`."""

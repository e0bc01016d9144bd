"""What tests share: models, references, graphs made by hand."""

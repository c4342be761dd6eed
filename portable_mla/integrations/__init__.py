"""Other projects' ways into this library. Each needs that project installed; nothing here is imported by itself."""

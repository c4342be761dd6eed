"""What adapters of vendor libraries share: finding and binding a library, and a step in the form they may read."""

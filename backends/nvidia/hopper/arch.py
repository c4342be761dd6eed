"""The one architecture with Hopper's instructions: wgmma, TMA and setmaxnreg."""

HOPPER = "sm90"

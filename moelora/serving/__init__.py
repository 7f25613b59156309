"""Engines that serve mixtures beside plain LoRAs and the base model; none of ours, and no HTTP of ours."""

"""The stages that experiments are made of: text, fine-tuning, reward learning, policy optimisation, evaluation."""

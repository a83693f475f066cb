"""PEFT on compressed models; nothing here imports peft before the user does."""

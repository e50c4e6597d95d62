-- One round: 20 transactions' worth of work in one. An account is drawn by the product of two even draws, so that low
-- numbers are drawn far more often than high ones; a query that has no outer row is evaluated once per round.
BEGIN;
CREATE TEMP TABLE IF NOT EXISTS pick (account INTEGER, amount INTEGER);
DELETE FROM pick;
WITH RECURSIVE number (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < 20)
INSERT INTO pick
SELECT 1 + (abs(random()) % 1000) * (abs(random()) % 1000) * (SELECT rows FROM setting) / 1000000, random() % 1000
FROM number;
UPDATE account SET balance = balance + 1 WHERE id IN (SELECT account FROM pick);
UPDATE account SET note = hex(randomblob(120)) WHERE id IN (SELECT account FROM pick LIMIT 5);
INSERT INTO history (account, amount, detail) SELECT account, amount, hex(randomblob(40)) FROM pick;
DELETE FROM history WHERE id <= (SELECT max(id) FROM history) - 20000;
COMMIT;
SELECT count(*) FROM account WHERE branch = (SELECT abs(random()) % 100) AND balance > 0;
